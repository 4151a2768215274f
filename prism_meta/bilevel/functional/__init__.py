"""A model and an objective as a function of parameters that differentiates itself."""
