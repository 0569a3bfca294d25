"""`tpad distill`: trains the multimodal LLM in three phases and publishes it. It may import all of `pipeline` but `export`."""
