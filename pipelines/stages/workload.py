"""The amount of work of a recipe, from which every stage counts its resource needs.

Bytes are those of one object in memory; stages add up the objects that they hold at the same time.
Floating-point operations are a lower bound: those of the matrix products, without anything smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ercsvd_deploy.models.description.architecture import Architecture, LayerLinears
from ercsvd_deploy.models.description.tensor_parallel import cuts_inputs
from ercsvd_deploy.models.streaming.ends import MAX_LOGITS_AT_ONCE, MAX_TOKENS_PER_BATCH
from ercsvd_deploy.recipe.sections import Recipe

FLOAT32, FLOAT64 = 4, 8  # bytes of a value


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length that pass through the layers."""

    count: int
    length: int
    pictures: int = 0  # in all sequences

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.count * self.length

    @property
    def batch_rows(self) -> int:
        """Sequences that are computed at once.

        Small models run smaller batches side by side (`streaming`), on four cores no more than this in total.
        """
        return min(self.count, max(1, MAX_TOKENS_PER_BATCH // self.length))

    @property
    def batch_tokens(self) -> int:
        """Tokens that are computed at once."""
        return self.batch_rows * self.length

    def first(self, count: int) -> Sequences:
        """Return the first `count` sequences, with their share of the pictures."""
        count = min(count, self.count)
        return Sequences(count, self.length, self.pictures * count // max(1, self.count))


@dataclass(frozen=True)
class Tower:
    """Work of the vision tower on one tile of a picture; in most models a picture is one tile."""

    pixels: int  # values of a tile
    tokens: int  # positions in the tower
    widest: int  # values of one position in memory at once
    features: int  # tokens of the language model that a tile becomes
    parameters: int  # of tower and projector
    fewest_tiles: int = 1  # that a picture becomes
    most_tiles: int = 1
    additions: int = 0  # layers in front of which features are added once more


@dataclass(frozen=True)
class Workload:
    """The work of a recipe on a model, in numbers.

    Attributes:
        recipe: The recipe.
        architecture: The model's architecture.
        stored: Bytes of a value in the files.
        computed: Bytes of a value where layers run.
        tokens_at_once: Tokens of a batch; batches of a small model that run side by side have together no
            more than `Sequences.batch_tokens`.
        calibration: The calibration sequences; None without calibration.
        judged: The sequences on which both models are compared.
        tower: The vision tower; None for text models.
        assumptions: Assumptions of the estimate, one line each.
    """

    recipe: Recipe
    architecture: Architecture
    stored: int
    computed: int
    tokens_at_once: int
    calibration: Sequences | None
    judged: tuple[Sequences, ...]
    tower: Tower | None
    assumptions: tuple[str, ...]

    @property
    def calibrating(self) -> Sequences:
        """The calibration sequences of a stage that requires them."""
        assert self.calibration is not None, "the schema asks for calibration where a stage needs it"
        return self.calibration

    @cached_property
    def largest_layer(self) -> LayerLinears:
        """The decoder layer with the most weights; in most families all layers are equal."""
        return max(self.architecture.layers, key=lambda layer: layer.parameters)

    @property
    def hidden(self) -> int:
        """Values of one token between layers."""
        return self.largest_layer.linears[0].in_features

    @cached_property
    def outside_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output layer if it has its own, vision."""
        prefix = f"{self.architecture.layers_prefix}."
        return sum(
            math.prod(shape)
            for name, shape in self.architecture.other_tensors.items()
            if not name.startswith(prefix)
        )

    @property
    def num_logits(self) -> int:
        """Logits of a token; none of a model that predicts no tokens."""
        return self.architecture.vocab_size if self.architecture.predicts_tokens else 0

    @property
    def head_parameters(self) -> int:
        """Parameters that turn the last layer's output into logits."""
        return self.num_logits * self.hidden

    @property
    def layer_weights(self) -> int:
        """Bytes of a loaded decoder layer."""
        return self.computed * self.largest_layer.parameters

    @property
    def layer_load(self) -> int:
        """Bytes of a layer while it is loaded: the stored tensors beside those in compute precision."""
        converting = 0 if self.stored == self.computed else self.layer_weights * self.stored // self.computed
        return self.layer_weights + converting

    @cached_property
    def layer_grams(self) -> int:
        """Bytes of the Grams of a layer's inputs, one for each group of Linears that share an input."""
        return FLOAT32 * sum(group[0].in_features ** 2 for group in self.largest_layer.groups)

    @cached_property
    def layer_metrics(self) -> int:
        """Bytes of the Fisher information of a layer's outputs, one for each Linear."""
        return FLOAT32 * sum(linear.out_features**2 for linear in self.largest_layer.linears)

    @property
    def outside_weights(self) -> int:
        """Bytes of everything outside the decoder layers, loaded."""
        return self.computed * self.outside_parameters

    @property
    def pixels(self) -> int:
        """Bytes of the pixels of all samples and questions, which are read before the first stage."""
        if self.tower is None:
            return 0
        calibrating = [self.calibration] if self.calibration else []
        pictures = sum(sequences.pictures for sequences in (*calibrating, *self.judged))
        return pictures * self.tower.most_tiles * self.tower.pixels * FLOAT32

    @cached_property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor in the files."""
        shapes = [*self.architecture.other_tensors.values()]
        shapes += [(linear.out_features, linear.in_features) for linear in self.architecture.linears]
        return max(map(math.prod, shapes)) * self.stored

    def activations(self, sequences: Sequences | None) -> int:
        """Return the bytes of all hidden states between two layers, with features that pictures add there."""
        if sequences is None:
            return 0
        positions = sequences.tokens
        if self.tower is not None:
            features = self.tower.most_tiles * self.tower.features
            positions += self.tower.additions * sequences.pictures * features
        return positions * self.hidden * self.computed

    def embedding(self, sequences: Iterable[Sequences]) -> int:
        """Return the bytes of the weights before the layers, and of a batch in the vision tower."""
        has_own_head = "lm_head.weight" in self.architecture.other_tensors
        loaded = self.outside_weights - (self.head_parameters * self.computed if has_own_head else 0)
        if self.tower is None:
            return loaded
        pictures = max(
            math.ceil(one_length.pictures / max(1, one_length.count)) * one_length.batch_rows
            for one_length in sequences
        )
        tokens = pictures * self.tower.most_tiles * self.tower.tokens
        return loaded + tokens * self.tower.widest * self.computed

    def passing(self, sequences: Sequences) -> int:
        """Return the bytes of a batch's activations within a decoder layer, without its input and output.

        Attention scores are never in memory. Attention holds queries, keys and values with the rotated
        copies, and what comes out; the MLP gate, up and their product; both the normalized input and a copy.
        """
        first_stack, last_stack = self.largest_layer.stacks[0], self.largest_layer.stacks[-1]
        attention = 3 * _attention_width(self.largest_layer) + sum(
            linear.out_features for linear in first_stack
        )
        owner = last_stack[0].name.rpartition(".")[0]
        before_last = next(s for s in self.largest_layer.stacks if s[0].name.rpartition(".")[0] == owner)
        mlp = last_stack[0].in_features + sum(linear.out_features for linear in before_last)
        return sequences.batch_tokens * (2 * self.hidden + max(attention, mlp)) * self.computed

    def training_pass(self, sequences: Sequences) -> int:
        """Return the bytes of a batch's pass through a decoder layer if a pass back follows.

        Every intermediate is kept: about two and a half times what is alive at once without.
        """
        return 5 * self.passing(sequences) // 2

    def logits(self, sequences: Sequences, *, parts: int) -> int:
        """Return the bytes of logits of so many parts of a batch, which are made one after the other."""
        tokens = min(self.tokens_at_once, MAX_LOGITS_AT_ONCE // self.architecture.vocab_size)
        rows = max(1, tokens // sequences.length)
        return min(parts * rows, sequences.count) * sequences.length * self.num_logits * FLOAT32

    def forward_flops(self, sequences: Sequences) -> float:
        """Return the operations of sequences passing all decoder layers, the vision tower before them."""
        attention = sum(map(_attention_width, self.architecture.layers))
        weights = sum(layer.parameters_per_token for layer in self.architecture.layers)
        each_token = 2 * weights + 2 * sequences.length * attention
        return float(sequences.tokens * each_token + self.tower_flops(sequences, parameters=None))

    def tower_flops(self, sequences: Sequences, *, parameters: int | None) -> float:
        """Return the operations of pictures passing so many parameters a position; None: the tower's."""
        if self.tower is None:
            return 0.0
        tokens = sequences.pictures * self.tower.fewest_tiles * self.tower.tokens
        return 2.0 * tokens * (self.tower.parameters if parameters is None else parameters)

    def head_flops(self, sequences: Sequences) -> float:
        """Return the operations of making logits for all positions."""
        return 2.0 * sequences.tokens * self.head_parameters

    def gram_flops(self, sequences: Sequences | None, layers: Sequence[LayerLinears]) -> float:
        """Return the operations of adding all inputs of some layers to their Grams, which are symmetric."""
        tokens = 0 if sequences is None else sequences.tokens
        return float(tokens) * sum(group[0].in_features ** 2 for layer in layers for group in layer.groups)


def _attention_width(layer: LayerLinears) -> int:
    """Return the values of a token that attention gives: all heads', which its last Linear reads."""
    widths = (linear.in_features for linear in layer.linears if cuts_inputs(linear.name))
    return next(widths, layer.linears[0].in_features)
