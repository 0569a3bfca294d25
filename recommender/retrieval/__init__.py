"""Makes a trained session model searchable and stores it: FAISS indexes, exact scoring of what they find, the published files. It may
import `session_model` only, and trains nothing.
"""
