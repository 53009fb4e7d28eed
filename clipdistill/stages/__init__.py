"""The pipeline's stages, from a configuration to artefacts: the only place that knows their order."""
