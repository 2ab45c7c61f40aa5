"""Test on point clouds: python -m point_clouds.test CONFIG CHECKPOINT --data_path DIR"""

from point_clouds.run import main

if __name__ == "__main__":
    main("test")
