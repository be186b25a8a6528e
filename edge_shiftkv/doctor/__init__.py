"""What is installed on this machine, and what keeps it from running: ``edge-shiftkv doctor``.

`examine` gathers the facts and judges them, `probe` is the part that touches the library, in a process of its own, and
`text` prints. All of it works without a library, and with one that is damaged.
"""
