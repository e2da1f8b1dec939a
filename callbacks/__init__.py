"""Training methods, each a fastai Callback that works in any Learner, and the schedules that say when they act.

`__init__.pyi` beside this file lists the names; each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
