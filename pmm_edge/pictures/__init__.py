"""Pictures of what a network sees: `pmm visualize`.

Every function returns a PIL image or plain arrays, for a file, a notebook or a report:

- `cams.cam_grid`: inputs and, beside each, where every stage finds its evidence (paper figures 1 and 4);
- `galleries.gallery_grid`: queries and what a model ranks first, right and wrong hits framed;
- `mixing.mixing_grid`: what stages II and III see in training;
- `overlap.overlap`: how little the stages' maps overlap.

Galleries need no torch where the model needs none.
"""
