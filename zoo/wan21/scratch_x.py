import torch

from zoo import wan22


class A:
    def __init__(self, **kwargs):
        m, sd = wan22, torch.load("x")
        m.load_state_dict(sd, False)
        m.load_state_dict(sd, strict=False)
        m.from_pretrained("wan21", trust_remote_code=True)
