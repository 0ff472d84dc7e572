"""How what patch reports is typed: read by tools/check_types, never run."""

import metalloid.transformers
from transformers import LlamaConfig, LlamaForCausalLM

report = metalloid.transformers.patch(LlamaForCausalLM(LlamaConfig()))
names: tuple[str, ...] = report.swapped["norms"]
text: str = str(report)
