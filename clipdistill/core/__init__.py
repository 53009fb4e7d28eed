"""Files, manifests, fingerprints and errors: no knowledge of the domain."""
