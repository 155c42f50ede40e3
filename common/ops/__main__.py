from common import ops_speed

ops_speed.main()
