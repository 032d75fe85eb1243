"""Text in and out: tokenizer, incremental detokenizer, chat templates, stop strings. Knows nothing
of the engine.
"""
