"""How the resolver decides each part of a configuration: one module per part."""
