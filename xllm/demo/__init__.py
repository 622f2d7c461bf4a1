"""The bundled demo model, in `model/`: data, no code. docs/demo-model.md says how it is made."""
