"""Write checkpoints: any model that Paceline reads as a GGUF file or a safetensors folder."""
