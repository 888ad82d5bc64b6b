"""Safe LLM fine-tuning: leave the riskiest response tokens out of the loss."""

__version__ = "0.1.0"
