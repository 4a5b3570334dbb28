"""EK-FAC and scoring: needs torch, numpy, scipy, safetensors and threadpoolctl alone, and can be copied out."""
