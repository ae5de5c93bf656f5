import sys, time, torch, numpy as np
from run.config import load_config
from run.options import Options
from utils import inspect_environment
from trainer import PPOTrainer
torch.set_num_threads(1)
def make(name, sets=(), precision=None, seed=1):
    config = load_config(f"configs/{name}.yaml", list(sets))
    task, _ = inspect_environment(config.environment)
    o = Options(torch.device("cpu"), processes=1, precision=precision)
    return PPOTrainer(config, task, seed, o)
if __name__ == "__main__":
    t = make(sys.argv[1], sys.argv[3:])
    t.start_workers()
    for i in range(int(sys.argv[2])):
        a=time.time(); s = t.train_update()
        print(i, round(time.time()-a,2), {k: round(v,4) for k,v in s.items() if k in ("training/kl","losses/value","losses/prediction","training/acting_kl","training/halvings","episode/reward_mean","episode/success_mean","gradients/all")}, flush=True)
    t.workers.close()
