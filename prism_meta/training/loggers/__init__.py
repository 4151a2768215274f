"""TensorBoard, MLflow and Weights & Biases beside ``metrics.jsonl``, through Lightning's loggers."""
