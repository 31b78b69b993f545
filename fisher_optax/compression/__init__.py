"""Prune, merge and trim models with the Fisher's help."""

from .matrix.masks import global_masks, mask
from .matrix.obert import block_moments, obert, obert_scores, obert_step
from .matrix.obs import obs
from .matrix.pruned import Pruned, output_error
from .matrix.scores import fisher, fisher_scores, magnitude, magnitude_scores, wanda, wanda_scores
from .matrix.sparsegpt import sparsegpt
from .merging.merge import Merged, merge
from .merging.task_vectors import add_task_vectors, dare, task_vector, ties
from .model.methods import register
from .model.owl import outlier_share, owl
from .model.pruning import PrunedModel, prune
from .model.reports import PrunedLayer, PruningReport
from .training.gradual import gradual
from .training.keeping import keep_masks
from .training.movement import movement, movement_masks
from .training.targets import cubic_schedule
from .vocabulary import Trimmed, removal_bias, removal_loss_change, remove_tokens, tokens_to_remove

__all__ = [
    "Merged",
    "Pruned",
    "PrunedLayer",
    "PrunedModel",
    "PruningReport",
    "Trimmed",
    "add_task_vectors",
    "block_moments",
    "cubic_schedule",
    "dare",
    "fisher",
    "fisher_scores",
    "global_masks",
    "gradual",
    "keep_masks",
    "magnitude",
    "magnitude_scores",
    "mask",
    "merge",
    "movement",
    "movement_masks",
    "obert",
    "obert_scores",
    "obert_step",
    "obs",
    "outlier_share",
    "output_error",
    "owl",
    "prune",
    "register",
    "removal_bias",
    "removal_loss_change",
    "remove_tokens",
    "sparsegpt",
    "task_vector",
    "ties",
    "tokens_to_remove",
    "wanda",
    "wanda_scores",
]
