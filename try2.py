import sys, numpy as np, torch
from torch.nn import functional as F
from try1 import make
from run.config import check_config, load_config
import itertools
def check(t, S):
    b=t.buffer; b.segment_length=S
    worst=0
    with torch.no_grad(), t._precision():
        for samples in b.minibatches(np.random.default_rng(0)):
            batch=b.minibatch(samples)
            e=t.model.embed(batch.observations)
            x=t.model.complete(F.embedding(batch.which,e),batch.vectors,batch.step)
            out=t.forward(x,batch.past,batch.masks)
            worst=max(worst,(out.policy.log_prob(batch.actions)-batch.log_probs).abs().max().item(),(out.value-batch.values).abs().max().item())
    return worst
def main():
  for prec in (None,"bf16"):
    for name, core in [("poc_memory_env", {"recurrence":dict(layer_type=l,embed_dim=32,hidden_state_size=24,num_layers=n)}) for l in ("gru","lstm") for n in (1,2)]+[("poc_memory_env",{"memoryless":dict(embed_dim=32)})]+[("mystery_path_grid",{"transformer":dict(num_blocks=2,embed_dim=32,num_heads=2,memory_length=40,positional_encoding="relative")}), ("mystery_path_grid",{"recurrence":dict(layer_type="gru",embed_dim=32,hidden_state_size=24)})]:
      c=load_config(f"configs/{name}.yaml").model_dump()
      c={k:v for k,v in c.items() if k not in("transformer","recurrence","memoryless")}|core|dict(n_workers=8,worker_steps=64,n_mini_batch=4)
      import try1
      from utils import inspect_environment
      from run.options import Options
      from trainer import PPOTrainer
      c=check_config(c,"x"); task,_=inspect_environment(c.environment)
      t=PPOTrainer(c,task,1,Options(torch.device("cpu"),processes=1,precision=prec))
      t.start_workers(); t.train_update(); t.sample()
      print(prec,name,list(core.values())[0], [f"{check(t,S):.1e}" for S in (1,2,8,64)], f"acting {t.acting_kl():.1e}")
      t.workers.close()
if __name__=="__main__": main()
