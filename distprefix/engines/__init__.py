"""Plug-ins for inference engines: their KV goes through Redis from one to the other."""
