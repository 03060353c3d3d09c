"""Real data: sources of images or stored codes, crops, and the pipeline that makes batches of them."""
