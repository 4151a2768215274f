"""Studies: methods, conditions, seeds and folds that are trained and scored alike, so that they compare."""
