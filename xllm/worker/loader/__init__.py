"""Reading a model directory: configuration files and safetensors weights."""
