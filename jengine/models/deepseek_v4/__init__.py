"""DeepSeek-V4, Flash and Pro (arXiv:2606.19348). One file for each idea; `model.py` joins them."""
