"""The Transformer core.

Tensor names carry their dimensions:

| letter | dimension |
|---|---|
| B | batch (rows) |
| T | query positions of this call |
| S | key positions: what is cached plus T |
| D | width of the residual stream |
| H | query heads |
| G | key/value heads (H is a multiple of G) |
| K | width of a head |
| F | inner width of the feed-forward layer |
| V | vocabulary |
| R | rank of a LoRA adapter |
"""
