def ragged_paged_attention(*args, **kwargs):
    raise NotImplementedError
