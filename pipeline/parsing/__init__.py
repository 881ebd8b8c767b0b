"""Readers of JSON and YAML that may come from elsewhere: typed and bounded, each fault in one sentence."""
