"""The transformers plugin: config, quantizer, streaming converters, saving. The only layer that imports it."""
