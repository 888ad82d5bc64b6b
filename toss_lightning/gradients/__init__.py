"""Corrections of the task gradient before the optimizer step."""

from toss_lightning.gradients.base import Correction, Gradients, Kind, Probe, RowProducts
from toss_lightning.gradients.dualselect import DualSelect
from toss_lightning.gradients.row_gradients import RowGradients
from toss_lightning.gradients.safegrad import SafeGrad
from toss_lightning.gradients.spf import SPF

__all__ = ["SPF", "Correction", "DualSelect", "Gradients", "Kind", "Probe", "RowGradients", "RowProducts", "SafeGrad"]
