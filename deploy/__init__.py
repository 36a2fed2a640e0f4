"""How paygate is delivered: manifests for those who run it, and what tries the image before it is published."""
