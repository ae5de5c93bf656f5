from run.options import Options
class Run: pass
