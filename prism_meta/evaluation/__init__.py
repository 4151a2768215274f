"""From a trained model to label volumes and measurements."""
