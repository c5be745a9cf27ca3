"""Write a checkpoint as one file for another runtime: GGUF for llama.cpp."""
