import torch
from alignkit.decode import Decode
def test_x(policy, rows):
    b = policy.generate(rows(3), [2,1,3], Decode(max_new_tokens=6), generator=torch.Generator().manual_seed(0))
    lp = policy.forward(b)
    print(b.lengths, (lp-b.logprobs).abs().max(), len(policy.tokenizer), b.responses, lp, sum(p.numel() for p in policy.model.parameters()))
