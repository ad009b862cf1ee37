"""KV events of engines: what they store and drop, from the wire into the shared tree. Needs ``distprefix[events]``."""
