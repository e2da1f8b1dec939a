"""Training methods, each a fastai Callback that works in any Learner."""
