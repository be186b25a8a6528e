"""Many requests at once: `Runtime.generate_many`, and from files to a file, ``edge-shiftkv batch``.

Prompts are read one after the other, in one context that stays: reading fills the processor as it is. What is kept of
one is handed over to a free slot, a sequence of another context. All slots are decoded together, a token of each in one
pass over the weights, and a slot whose answer came to its end is given the next prompt.

`jobs` takes rows from files and has each answered, by a process of its own (`worker`), into a file that a later run
goes on with (`out_file`).
"""
