"""Judge a compressed model and its original: the quality of both, and the distance between their outputs.

    layer error   ||H' - H||_F / ||H||_F over the tokens of a text, H the original's output of the layer
    log-prob KL   mean over positions of KL(p || p'), p the original's next-token distribution, in nats

The original is judged first and alone. Its results suffice to compare any number of compressed models with
it: its quality, the last layer's outputs, and the outputs of the earlier layers at evenly spaced positions,
at most `MOST_POSITIONS` of a text. The error of the last layer, over all tokens, is the criterion by which
ERC-SVD (arXiv 2505.20112) chooses its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch, QuestionSample, text_samples
from ercsvd_deploy.evaluation.exact_match import ExactMatch, judge_questions
from ercsvd_deploy.evaluation.perplexity import Loss, judge_text
from ercsvd_deploy.evaluation.quality import Quality
from ercsvd_deploy.format.described import Measured

if TYPE_CHECKING:
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel

MOST_POSITIONS = 8192  # of a text, at which the outputs of layers before the last are compared

Outputs = Mapping[str, torch.Tensor]  # text -> outputs [positions, hidden] of a layer of the original


@dataclass(frozen=True)
class OutputChange:
    """Distance of the outputs on each text from the original's."""

    layer_errors: Annotated[
        dict[str, tuple[Measured, ...]],
        Field(
            description="Text -> relative error (Frobenius) of every decoder layer's output, from the first "
            f"on; before the last layer at up to {MOST_POSITIONS} evenly spaced positions."
        ),
    ] = field(default_factory=dict)
    final_layer_error: Annotated[
        dict[str, Measured], Field(description="Text -> error of the last layer, over all tokens.")
    ] = field(default_factory=dict)
    logprob_kl: Annotated[
        dict[str, Measured],
        Field(
            description="Text -> mean KL divergence of the next-token distribution from the original's, in "
            "nats per token."
        ),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Quality of both models, and the distance between their outputs.

    Attributes:
        original: Quality of the reference.
        compressed: Quality of the compressed model, on the same windows and questions.
        change: Distance between their outputs.
        window_kl: Text -> `logprob_kl` of every window, in the text's order.
    """

    original: Quality = field(default_factory=Quality)
    compressed: Quality = field(default_factory=Quality)
    change: OutputChange = field(default_factory=OutputChange)
    window_kl: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@torch.no_grad()
def judge_original(
    model: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    keep: Callable[[int, Outputs], None],
    on_layer: Callable[[], None] = lambda: None,
) -> Quality:
    """Return the quality of the original, and pass its layers' outputs to `keep` for later comparisons.

    Args:
        model: The original.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        keep: Called with every layer's index and its outputs on the texts, complete for the last layer.
        on_layer: Called after every decoder layer, for progress.
    """
    judged = _Judged(model, texts, questions)
    last_layer = model.num_layers - 1
    for index in range(model.num_layers):
        judged.advance(index)
        positions = _all_positions if index == last_layer else _some_positions
        keep(index, {name: positions(states) for name, states in judged.states_of_texts().items()})
        on_layer()
    return judged.quality()


@torch.no_grad()
def judge_compressed(
    compressed: LayerwiseModel,
    original: LayerwiseModel,
    original_quality: Quality,
    original_outputs: Callable[[int], Outputs],
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    on_layer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Judge a compressed model and compare it with an original that `judge_original` has judged.

    Args:
        compressed: The original model after compression.
        original: The original; only its output layer is run.
        original_quality: The original's quality on the same texts and questions.
        original_outputs: Returns the original's outputs that `keep` received, by layer index.
        texts: Name -> token ids [windows, tokens].
        questions: Name -> questions about pictures.
        on_layer: Called after every decoder layer, for progress.
    """
    judged = _Judged(compressed, texts, questions)
    errors: dict[str, list[float]] = {name: [] for name in texts}
    last_layer = compressed.num_layers - 1
    final: Outputs = {}
    for index in range(compressed.num_layers):
        judged.advance(index)
        final = original_outputs(index)
        for name, states in judged.states_of_texts().items():
            true = final[name].to(compressed.device)
            if index == last_layer:
                error = relative_error(states, _as_batches(true, judged.text_batches[name]))
            else:
                error = relative_error([_some_positions(states)], [true])
            errors[name].append(error)
        on_layer()
    losses, divergences = {}, {}
    predicted = judged.states_of_texts() if compressed.architecture.predicts_tokens else {}
    for name, states in predicted.items():
        batches = judged.text_batches[name]
        true_states = _as_batches(final[name].to(original.device), batches)
        losses[name], divergences[name] = _judge_text((original, compressed), batches, (true_states, states))
    change = OutputChange(
        {name: tuple(listed) for name, listed in errors.items()},
        {name: listed[-1] for name, listed in errors.items()},
        {name: sum(of_windows) / max(1, len(of_windows)) for name, of_windows in divergences.items()},
    )
    compressed_quality = Quality(
        {name: loss.perplexity for name, loss in losses.items()}, judged.exact_match()
    )
    return Comparison(original_quality, compressed_quality, change, divergences)


def compare_models(
    original: LayerwiseModel,
    compressed: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    on_layer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Judge two models of one architecture, with the original's outputs kept in memory.

    Args:
        original: The reference.
        compressed: The same model after compression.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        on_layer: Called after every decoder layer of either model, for progress.
    """
    outputs: dict[int, Outputs] = {}
    original_quality = judge_original(original, texts, questions, outputs.__setitem__, on_layer)
    return judge_compressed(
        compressed, original, original_quality, outputs.__getitem__, texts, questions, on_layer
    )


class _Judged:
    """A model's hidden states on all texts and questions, advanced layer by layer."""

    def __init__(
        self,
        model: LayerwiseModel,
        texts: Mapping[str, torch.Tensor],
        questions: Mapping[str, Sequence[QuestionSample]],
    ) -> None:
        self.model = model
        self.questions = questions
        self.text_batches = {name: model.batches(text_samples(windows)) for name, windows in texts.items()}
        self.question_batches = {
            name: model.batches([question.sample for question in listed])
            for name, listed in questions.items()
        }
        self._groups = [*self.text_batches.values(), *self.question_batches.values()]
        self.states = [model.embed(batches) for batches in self._groups]

    def advance(self, index: int) -> None:
        """Advance all hidden states by one layer, which is loaded once."""
        with self.model.layer(index) as module:
            for batches, states in zip(self._groups, self.states, strict=True):
                self.model.advance(index, batches, states, module=module)

    def states_of_texts(self) -> dict[str, list[torch.Tensor]]:
        """Return text -> outputs [rows, tokens, hidden] of the current layer, for every batch."""
        return dict(zip(self.text_batches, self.states, strict=False))

    def quality(self) -> Quality:
        """Return perplexities and exact matches; call it after the last layer."""
        perplexity = {
            name: judge_text(self.model, self.text_batches[name], states)
            for name, states in self.states_of_texts().items()
            if self.model.architecture.predicts_tokens
        }
        return Quality(perplexity, self.exact_match())

    def exact_match(self) -> dict[str, ExactMatch]:
        """Return the exact match on every set of questions; call it after the last layer."""
        states = self.states[len(self.text_batches) :]
        return {
            name: judge_questions(self.model, self.questions[name], batches, hidden)
            for (name, batches), hidden in zip(self.question_batches.items(), states, strict=True)
        }


def _some_positions(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return outputs [positions, hidden] at evenly spaced positions of all batches."""
    step = -(-sum(tensor[..., 0].numel() for tensor in states) // MOST_POSITIONS)
    return torch.cat([tensor.flatten(0, 1)[::step] for tensor in states])


def _all_positions(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return outputs [positions, hidden] of all batches; the inverse of `_as_batches`."""
    return torch.cat([tensor.flatten(0, 1) for tensor in states])


def _as_batches(outputs: torch.Tensor, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Return outputs [positions, hidden] as [rows, tokens, hidden] for every batch."""
    chunks = torch.split(outputs, [batch.tokens.numel() for batch in batches])
    return [part.reshape(*batch.tokens.shape, -1) for part, batch in zip(chunks, batches, strict=True)]


def relative_error(changed: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> float:
    """Return ||changed - original||_F / ||original||_F over tensors of pairwise equal shapes; 0/0 is 0."""
    pairs = list(zip(changed, original, strict=True))
    error_energy = sum((tensor - reference).double().square().sum().item() for tensor, reference in pairs)
    energy = sum(reference.double().square().sum().item() for reference in original)
    return float((error_energy / energy) ** 0.5) if energy else 0.0


def _judge_text(
    models: tuple[LayerwiseModel, LayerwiseModel],
    batches: Sequence[Batch],
    hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
) -> tuple[Loss, tuple[float, ...]]:
    """Return the loss of the second model on a text, and its mean divergence from the first by window."""
    loss = Loss()
    divergences: dict[int, float] = {}
    rows = (model.logits(batches, states) for model, states in zip(models, hidden, strict=True))
    for (_, _, original), (window, tokens, compressed) in zip(*rows, strict=True):
        loss.add(window, tokens, compressed)
        divergence = functional.kl_div(
            compressed[:-1].log_softmax(-1), original[:-1].log_softmax(-1), reduction="sum", log_target=True
        ).item()
        divergences[window] = divergence / max(1, len(tokens) - 1)
    return loss, tuple(divergences[window] for window in sorted(divergences))
