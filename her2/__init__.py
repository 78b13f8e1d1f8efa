"""HER2 tumor segmentation with subtype balancing by generative models: one module per idea."""
