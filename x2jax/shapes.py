"""Shape legend: the suffix of an array's name spells its axes (`q_BLHK`).

| letter | axis                                                                    |
|--------|-------------------------------------------------------------------------|
| B      | batch (images, each with its instruction)                               |
| S      | image slots of a sample: the target, then the sources                   |
| T      | text tokens                                                             |
| I      | image-stream tokens: target, sources, padding last                      |
| L      | joint sequence: text, then the image stream                             |
| N      | hidden states of the MLLM: embeddings and every layer                   |
| D      | model width                                                             |
| H, K   | attention heads, head dimension                                         |
| F      | hidden width of an MLP                                                  |
| E, R   | experts, rank                                                           |
| C      | packed latent channels: VAE channels x 2 x 2                            |

A digit is a fixed size: `positions_BI3` holds three position ids a token.
"""
