"""calmerge: one multi-task model out of many fine-tuned checkpoints, without retraining and without labels."""
