def argmax_rows(*args, **kwargs):
    raise NotImplementedError
