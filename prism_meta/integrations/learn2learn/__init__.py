"""learn2learn, both ways: our inner optimizers in its loops, its learners as a strategy of ours.

learn2learn 0.2.0 is imported with this package, which takes seconds. Without it this package can still
be imported, and what is in it raises an error with the command that installs it, ``INSTALL``. The
examples are run by the tests of both directions.
"""

from prism_meta.integrations.learn2learn.learner import PrismLearner
from prism_meta.integrations.learn2learn.strategy import Learn2LearnStrategy, LearnerParameters
from prism_meta.integrations.learn2learn.upstream import INSTALL

__all__ = ["INSTALL", "Learn2LearnStrategy", "LearnerParameters", "PrismLearner"]
