"""Training: `fit` for any rule, batches and optimizers; and runs with their folders, evaluation, comparison and report.

rule = hbll.make_rule("stream", network, stage=(3, 4))
fit(rule, batches, torch.optim.AdamW(rule.parameters(), lr=1e-3), epochs=10, precision="bfloat16")
"""

from hbll.train.descent import Descent, Fit, fit
from hbll.train.divergence import DivergenceWarning
from hbll.train.error_feedback import ErrorFeedback
from hbll.train.optimizers import make_optimizers

__all__ = ["Descent", "DivergenceWarning", "ErrorFeedback", "Fit", "fit", "make_optimizers"]
