"""What holds the KV bytes themselves: payloads, how they are packed, and where they lie."""
