"""What one grammar may cost. llguidance keeps to the first four by itself, token by token."""

from typing import Final

# Ambiguous grammars: 1,000 items in a row take 30 ms for a token, the default of 2,000 takes 250.
MAX_ITEMS_IN_ROW: Final = 1_000
STEP_MAX_ITEMS: Final = 50_000
STEP_LEXER_FUEL: Final = 200_000  # 14 ms
# 150 bytes each, so 40 MB for a request. A counted repetition takes one for each character: 50,000
# ended `[a-z ]{200000}` after 7,000 tokens.
MAX_LEXER_STATES: Final = 250_000

MAX_SOURCE_BYTES: Final = 256 * 1024  # of a schema, an expression, all choices
# What the process that checks grammars may take for one of them, beside what it has.
CHECK_SECONDS: Final = 5.0
CHECK_MEMORY_BYTES: Final = 512 * 2**20
# Half of what threads get elsewhere: what recurses too deeply does so there first.
CHECK_STACK_BYTES: Final = 4 * 2**20
MAX_MESSAGE_CHARS: Final = 300  # of an error; some quote the grammar
