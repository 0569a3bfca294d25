"""`tpad export-embeddings`: runs a distilled model over the whole catalogue and publishes the vectors. It trains nothing and may not
import `distill`.
"""
