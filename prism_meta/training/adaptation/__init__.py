"""Adapting a run to a few labelled cases of a site."""
