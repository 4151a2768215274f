"""learn2learn in both directions: our inner optimizers in its loops, and its learners as a strategy.

This package imports learn2learn 0.2.0, which takes seconds. If that is not installed, the package can
still be imported, and its classes raise an error with the command that installs it, ``INSTALL``.
"""

from prism_meta.integrations.learn2learn.learner import PrismLearner
from prism_meta.integrations.learn2learn.strategy import Learn2LearnStrategy, LearnerParameters
from prism_meta.integrations.learn2learn.upstream import INSTALL

__all__ = ["INSTALL", "Learn2LearnStrategy", "LearnerParameters", "PrismLearner"]
