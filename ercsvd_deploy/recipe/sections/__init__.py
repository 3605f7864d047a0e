"""The recipe's sections as frozen models: every key of a recipe, its type, default and meaning.

A key is explained by its description here, and nowhere else: the JSON schema for editors and docs/recipes.md
are generated from it. `recipe.load` reads YAML into these models; `contradictions` checks that the sections
fit together (a stage that needs calibration, the order of the stages).

No torch here: `ercsvd validate` and editors' tools read a recipe without loading a numerical library.
"""

from ercsvd_deploy.recipe.sections.inputs import (
    Calibration,
    HeldOutText,
    HubDataset,
    JsonLines,
    ModelSource,
    ParquetFile,
    SavedDataset,
    TextDataset,
    TextFile,
)
from ercsvd_deploy.recipe.sections.recipe import Recipe
from ercsvd_deploy.recipe.sections.results import Evaluation, Export, LmEval, Serving, Target
from ercsvd_deploy.recipe.sections.vision import (
    ConversationFile,
    HubConversations,
    ImageFolder,
    PictureDataset,
    QuestionDataset,
    Vision,
    VisualQuestions,
)

__all__ = [
    "Calibration",
    "ConversationFile",
    "Evaluation",
    "Export",
    "HeldOutText",
    "HubConversations",
    "HubDataset",
    "ImageFolder",
    "JsonLines",
    "LmEval",
    "ModelSource",
    "ParquetFile",
    "PictureDataset",
    "QuestionDataset",
    "Recipe",
    "SavedDataset",
    "Serving",
    "Target",
    "TextDataset",
    "TextFile",
    "Vision",
    "VisualQuestions",
]
