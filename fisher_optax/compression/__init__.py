"""Prune, merge and trim models with the Fisher's help."""

from .gradual import gradual
from .keeping import keep_masks
from .masks import global_masks, mask
from .merging import Merged, merge
from .methods import register
from .movement import movement, movement_masks
from .obert import block_moments, obert, obert_scores, obert_step
from .obs import obs
from .owl import outlier_share, owl
from .pruned import Pruned, output_error
from .pruning import PrunedModel, prune
from .reports import PrunedLayer, PruningReport
from .scores import fisher, fisher_scores, magnitude, magnitude_scores, wanda, wanda_scores
from .sparsegpt import sparsegpt
from .targets import cubic_schedule
from .task_vectors import add_task_vectors, dare, task_vector, ties
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
